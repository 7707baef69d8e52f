"""What several tests share: small models, pipelines, files and processes."""
