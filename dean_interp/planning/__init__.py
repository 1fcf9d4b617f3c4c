"""What work will take before it is begun: a scoring pass, a study, an improvement, a comparison; and what it took."""
