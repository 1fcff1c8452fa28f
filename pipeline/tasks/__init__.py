"""What is asked of the model and what its text means, one file a kind of job."""
