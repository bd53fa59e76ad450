"""What users give: files, numbers and splits, each checked in one place."""
