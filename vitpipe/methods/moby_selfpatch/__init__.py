"""SelfPatch on MoBY."""
