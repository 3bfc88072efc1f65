"""The bridge to mmdet and mmseg; imported only when used."""
