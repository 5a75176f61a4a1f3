"""A page whose socket reconnects: `uvicorn examples.browser_client.app:app`."""
