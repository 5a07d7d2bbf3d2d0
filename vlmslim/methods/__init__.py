"""The methods: one file each, or a folder where a method brings helpers. The file's name is the method's name."""
