"""Questions of many clients, answered by one model in joint batches."""
