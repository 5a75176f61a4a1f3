"""What goes over the wire, without any I/O: encoded messages and control frames."""
