"""The duties of the module, one a file. They reach Synapse through the port only."""
