//! Who may touch a pool or a store: two open-file-description locks on its file; and whose turn it
//! is to make one: [`Turn`].
//!
//! A store has only the owner lock, on a file of its own: nobody maps it.
//!
//! Byte 0 is the *owner* lock: exclusive, held by one `EngineCore` for as long as it uses the
//! pool.
//! Byte 1 is the *mappers* lock: shared, held by every process that maps the file, `EngineCore`
//! included. Taking a pool over needs both exclusively: a dead owner does not prove that its
//! workers have stopped writing. The kernel drops the locks with the last descriptor, also after
//! SIGKILL.
//!
//! A child that was forked and has not yet called `exec` shares our descriptors. An owner that goes
//! therefore gives its lock back by hand: else the next start would find it held by nobody in
//! particular. The mappers lock stays until the last descriptor goes, as such a child shares the
//! mapping.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::private_dir::{self, Role, names};
use kvcellar_block::error::{Error, Result};

const OWNER: i64 = 0;
const MAPPERS: i64 = 1;

/// Locks held on one file.
#[derive(Debug)]
pub struct FileLocks {
    file: File,
    /// The process that became the owner by these: a forked child that drops its copy must not give
    /// back what its parent holds.
    owned_by: Option<u32>,
}

impl Drop for FileLocks {
    fn drop(&mut self) {
        if self.is_owner() {
            self.mark_used();
            // Where this fails the kernel gives it back with the last descriptor.
            let _ = lock_byte(&self.file, OWNER, libc::F_UNLCK);
        }
    }
}

/// The turn among starts in one directory: while it is held, nobody else looks at the machine,
/// removes or makes pools or stores.
#[derive(Debug)]
pub struct Turn {
    file: File,
    held_by: u32,
}

impl Turn {
    /// Waits for the turn among those who lock the file at `path`, and makes that file.
    ///
    /// # Errors
    /// [`Error::TryLater`] when others have it for longer than `patience`; [`Error::Io`] and
    /// [`Error::Config`] when its file cannot be had.
    pub fn wait(path: &Path, role: &Role, patience: Duration) -> Result<Self> {
        let deadline = Instant::now() + patience;
        loop {
            let file = private_dir::open_or_create(path, role)?;
            // Whoever locks a file that was removed meanwhile has a turn in nothing.
            if lock_byte(&file, OWNER, libc::F_WRLCK).is_ok() && names(path, &file) {
                // For people only; some file systems for huge pages take no writes.
                drop(file.set_len(0).and_then(|()| file.write_all_at(std::process::id().to_string().as_bytes(), 0)));
                return Ok(Self { file, held_by: std::process::id() });
            }
            if Instant::now() >= deadline {
                let holder = std::fs::read_to_string(path).unwrap_or_default();
                return Err(Error::TryLater {
                    what: format!("{}", path.parent().unwrap_or(path).display()),
                    holder: format!("a start (process {}) has held {} for {patience:?}", holder.trim(), path.display()),
                });
            }
            sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.held_by == std::process::id() {
            // Where this fails the kernel gives it back with the last descriptor.
            let _ = lock_byte(&self.file, OWNER, libc::F_UNLCK);
        }
    }
}

fn lock_byte(file: &File, byte: i64, kind: i32) -> std::result::Result<(), Errno> {
    let range = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&range)).map(drop)
}

fn is_held(file: &File, byte: i64) -> bool {
    let mut range = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut range)).is_ok() && range.l_type != libc::F_UNLCK as libc::c_short
}

impl FileLocks {
    /// Tries to become the owner. `None`: another engine is, or the file was replaced meanwhile.
    pub fn own(file: File, path: &Path) -> Option<Self> {
        lock_byte(&file, OWNER, libc::F_WRLCK).ok()?;
        let locks = Self { file, owned_by: Some(std::process::id()) };
        names(path, &locks.file).then_some(locks)
    }

    /// Whether this process is the owner, and not a child that inherited a copy.
    pub fn is_owner(&self) -> bool {
        self.owned_by == Some(std::process::id())
    }

    /// Owner: the file is in use now. Files that nobody uses go in the order of this.
    pub fn mark_used(&self) {
        // Where the system does not keep times, files go in another order.
        drop(self.file.set_modified(SystemTime::now()));
    }

    /// Owner: waits until no process of an earlier engine maps the file. `false`: some still do
    /// after `patience`.
    pub fn drain_mappers(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            if lock_byte(&self.file, MAPPERS, libc::F_WRLCK).is_ok() {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Owner: becomes a mapper beside others. An exclusive lock becomes shared without a gap.
    ///
    /// # Errors
    /// [`Error::TryLater`] when another process holds the mappers lock exclusively.
    pub fn share_mapping(&self, path: &Path) -> Result<()> {
        lock_byte(&self.file, MAPPERS, libc::F_RDLCK).map_err(|_| Error::TryLater {
            what: path.display().to_string(),
            holder: "another engine is taking the pool over".to_owned(),
        })
    }

    /// Worker: becomes a mapper of a file whose owner lives.
    ///
    /// # Errors
    /// [`Error::TryLater`] when somebody is taking the pool over.
    pub fn attach(file: File, path: &Path) -> Result<Self> {
        let locks = Self { file, owned_by: None };
        locks.share_mapping(path)?;
        Ok(locks)
    }

    /// Removes the file's name if it is still this file's.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses.
    pub fn unlink(&self, path: &Path) -> Result<()> {
        if !names(path, &self.file) {
            return Ok(());
        }
        std::fs::remove_file(path).map_err(|error| Error::io("removing", path, error, "Remove it by hand"))
    }
}

/// Who holds a file, for people: (an engine owns it, processes map it).
pub fn holders(file: &File) -> (bool, bool) {
    debug_assert!(file.as_raw_fd() >= 0);
    (is_held(file, OWNER), is_held(file, MAPPERS))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLE: Role = Role { setting: "pool_dir", creating: "making", remedy: "", instead: "" };

    #[test]
    fn an_owner_that_goes_leaves_nothing_locked_in_a_forked_child() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let open = || File::options().write(true).open(file.path()).expect("opened");
        let owner = FileLocks::own(open(), file.path()).expect("nobody else does");
        // What a child holds between fork and exec.
        let shared = owner.file.try_clone().expect("cloned");
        assert!(FileLocks::own(open(), file.path()).is_none());
        drop(owner);
        let next = FileLocks::own(open(), file.path()).expect("given back");
        drop(shared);
        assert!(FileLocks::own(open(), file.path()).is_none(), "the next owner's lock went with the child");
        drop(next);
    }

    #[test]
    fn starts_take_turns_and_the_patient_learn_who_has_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("turn");
        let turn = Turn::wait(&path, &ROLE, Duration::ZERO).expect("nobody has it");
        let error = Turn::wait(&path, &ROLE, Duration::from_millis(30)).expect_err("it is taken").to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        std::thread::scope(|scope| {
            let next = scope.spawn(|| Turn::wait(&path, &ROLE, Duration::from_mins(1)));
            drop(turn);
            assert!(next.join().expect("no panic").is_ok());
        });
    }

    #[test]
    fn a_copy_in_another_process_gives_nothing_back() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let open = || File::options().write(true).open(file.path()).expect("opened");
        let owner = FileLocks::own(open(), file.path()).expect("nobody else does");
        let copy = FileLocks { file: owner.file.try_clone().expect("cloned"), owned_by: Some(std::process::id() + 1) };
        drop(copy);
        assert!(FileLocks::own(open(), file.path()).is_none());
    }
}
