"""What the template promises to whoever builds on it: over HTTP, on their machine, in what its pages say."""
