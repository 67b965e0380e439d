"""What a developer needs on one machine: embedded servers, an SMTP sink, all processes, the demo. Not in the image."""
