"""From documents to a token store: encoding in parallel, safe to interrupt and to repeat."""
