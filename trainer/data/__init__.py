"""Where training tokens come from."""
