"""The two ends of the paper: which raw clips to train on, and which method's videos are better."""
