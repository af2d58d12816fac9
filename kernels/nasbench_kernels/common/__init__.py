"""What the operations share: programmatic dependent launch, launch choices, helpers of tiles."""
