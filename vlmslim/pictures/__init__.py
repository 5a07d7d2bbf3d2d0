"""Pictures of kept visual tokens: `Slim.picture`, `vlmslim show`, and the parts of which both are made."""
