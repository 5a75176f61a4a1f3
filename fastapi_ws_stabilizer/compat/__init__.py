"""Private parts of FastAPI and Starlette that the package relies on, each with its supported range and fallback."""
