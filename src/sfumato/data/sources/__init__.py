"""Sources: a folder, an archive, a table or an embedded set becomes samples."""
