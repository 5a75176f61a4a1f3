"""State that outlives a connection: sessions, replay buffers and detached states."""
