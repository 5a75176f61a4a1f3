"""What the doctor looks at before a deploy: options, server and platform that do not go together."""
