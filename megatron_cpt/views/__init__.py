"""Tables and plots of plans, advice, data and differences."""
