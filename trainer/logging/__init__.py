"""What a run says of itself: lines, files, services, curves."""
