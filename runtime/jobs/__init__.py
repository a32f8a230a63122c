"""The work behind the commands: one generation or a batch, with reports; doctor, download, inspection."""
