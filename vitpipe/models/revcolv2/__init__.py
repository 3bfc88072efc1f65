"""RevColV2: reversible columns with a bottom-up encoder and a top-down decoder."""
