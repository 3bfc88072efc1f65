"""SelfPatch on DINO: patches learn from their neighbours."""
