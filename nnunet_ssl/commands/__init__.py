"""The work of `nnunet-ssl <command>`, one file a command."""
