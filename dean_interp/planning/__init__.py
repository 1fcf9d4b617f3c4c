"""What work will take before it is begun: one scoring pass, and a whole study."""
