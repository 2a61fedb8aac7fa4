"""What an edit is learned from and judged by: the same fact in many forms, and the subject's other facts."""
