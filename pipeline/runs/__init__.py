"""Opens, resumes, retries, sums and verifies run folders, and reads and writes their parts."""
