"""What every HTTP request and response of the service has in common."""
