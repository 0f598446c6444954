"""The commands of `flow-finetune`, one file each."""
