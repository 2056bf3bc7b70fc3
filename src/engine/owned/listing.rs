//! Pools and stores as people see them: their names, and who has them.

use std::fmt::{self, Display, Formatter, Write};
use std::path::Path;

use serde::{Serialize, Serializer};

use kvcellar_block::error::Error;

/// Who has a pool or a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// An engine owns it.
    InUse,
    /// Its engine is dead, but processes of it still map it. Pools only.
    Mapped,
    /// Nobody has it.
    Orphaned,
    /// Nobody has it, and its header or superblock is not whole.
    Damaged,
}

impl Ownership {
    /// As commands print it, and name it in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InUse => "used",
            Self::Mapped => "held",
            Self::Orphaned => "left",
            Self::Damaged => "damaged",
        }
    }

    /// From the two locks on its file, and whether what describes it is whole.
    pub fn of((is_owned, is_mapped): (bool, bool), is_whole: bool) -> Self {
        match (is_owned, is_mapped, is_whole) {
            (true, _, _) => Self::InUse,
            (false, true, _) => Self::Mapped,
            (false, false, true) => Self::Orphaned,
            (false, false, false) => Self::Damaged,
        }
    }
}

impl Display for Ownership {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        // Tables give it a width.
        out.pad(self.as_str())
    }
}

impl Serialize for Ownership {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// Hex form of a namespace, as in names of files and directories.
pub fn namespace_name(namespace: &[u8; 16]) -> String {
    namespace.iter().fold(String::new(), |mut name, byte| {
        // Writing to a String cannot fail.
        let _infallible = write!(name, "{byte:02x}");
        name
    })
}

/// A pool or store that is taken, with the process that has it where that is known.
pub fn name_with_owner(path: &Path, owner_pid: Option<u32>) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match owner_pid {
        Some(pid) => format!("{name} (process {pid})"),
        None => name,
    }
}

/// The refusal of what an engine uses. `owner_pid`: its process, where that is known.
pub fn in_use(what: String, owner_pid: Option<u32>) -> Error {
    let holder = owner_pid.map_or("an engine uses it".to_owned(), |pid| format!("process {pid} uses it"));
    Error::TryLater { what, holder }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_counts_more_than_contents() {
        let shown = |locks, is_whole| Ownership::of(locks, is_whole).to_string();
        assert_eq!(shown((true, true), false), "used");
        assert_eq!(shown((false, true), false), "held");
        assert_eq!(shown((false, false), true), "left");
        assert_eq!(shown((false, false), false), "damaged");
        assert_eq!(format!("{:<5}|", Ownership::Orphaned), "left |");
        assert_eq!(serde_json::to_value(Ownership::Mapped).ok(), Some("held".into()));
    }

    #[test]
    fn names_tell_namespace_and_owner() {
        assert_eq!(namespace_name(&[0xa0; 16]), "a0".repeat(16));
        assert_eq!(name_with_owner(Path::new("/d/a-0"), Some(7)), "a-0 (process 7)");
        assert_eq!(name_with_owner(Path::new("/d/a-0"), None), "a-0");
    }
}
