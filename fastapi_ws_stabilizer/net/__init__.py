"""Network facts below the application: origins, proxies, TCP."""
