"""A page with a socket that reconnects: `uvicorn examples.browser_client.app:app`."""
