"""What is known: the base models, and the identities made on them; never imports hdbcli."""
