//! Notices that the parent process is gone, so that an orphan lets go of the pool.
//!
//! A killed front end leaves `EngineCore` and its workers running, with nobody to send them work.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use kvcellar_block::error::{Error, Result};

/// Watches one process until it ends or the watch is dropped.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Calls `gone` once, from an own thread, when process `pid` has ended.
    ///
    /// # Errors
    /// [`Error::DeviceDead`] when the system has no means to watch a process (Linux before 5.3) or
    /// no such process exists.
    pub fn start(pid: u32, gone: impl FnOnce() + Send + 'static) -> Result<Self> {
        let dead = |problem: String| Error::DeviceDead {
            device: "watching the parent process".to_owned(),
            problem,
            remedy: "The pool is let go of at exit only".to_owned(),
        };
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
        let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let raw = i32::try_from(raw)
            .ok()
            .filter(|raw| *raw >= 0)
            .ok_or_else(|| dead(std::io::Error::last_os_error().to_string()))?;
        // SAFETY: the descriptor is new and nobody else owns it.
        let process = unsafe { File::from_raw_fd(raw) };
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(|error| dead(error.to_string()))?);
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("kvcellar-watch".to_owned())
            .spawn(move || {
                let mut events =
                    [PollFd::new(process.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
                while let Err(nix::errno::Errno::EINTR) = poll(&mut events, PollTimeout::NONE) {}
                if events[1].any() != Some(true) && events[0].any() == Some(true) {
                    gone();
                }
            })
            .map_err(|error| dead(error.to_string()))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Writing to an eventfd fails only when its counter is full: then the thread has been told
        // already.
        let _told = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // The callback may have panicked; there is nobody left to tell.
            drop(thread.join());
        }
    }
}
