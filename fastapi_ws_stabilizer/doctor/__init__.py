"""Checks before a deploy: options, server and platform that conflict."""
