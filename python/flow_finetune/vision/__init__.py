"""Image classification with the same methods: probe a new head, fine-tune with weights, measure what was kept."""
