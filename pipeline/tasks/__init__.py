"""Words what the model is asked and reads what its text means, one file a kind of job."""
