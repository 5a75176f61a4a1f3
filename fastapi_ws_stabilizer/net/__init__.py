"""Facts of the network below the application: origins, proxies, TCP."""
