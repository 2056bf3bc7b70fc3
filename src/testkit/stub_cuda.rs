//! Builds the stub of the driver's library, loads it in the driver's place, and speaks to it.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use kvcellar_engine::gpu::ComputeStream;
use kvcellar_engine::gpu::cuda::pinning;

/// What the stub does to the copier's calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    None = 0,
    /// Without the wait for vLLM's stream.
    CopiesWaitForNothing = 1,
    /// Slots and fences are released before their event.
    EventsAreOverAtOnce = 2,
    /// vLLM's stream does not wait for fences.
    ComputeWaitsForNothing = 3,
    /// Without the waits of our own streams for each other.
    CopiesIgnoreEachOther = 4,
}

impl Mutation {
    /// The one that prints like this.
    pub fn named(name: &str) -> Self {
        [
            Self::None,
            Self::CopiesWaitForNothing,
            Self::EventsAreOverAtOnce,
            Self::ComputeWaitsForNothing,
            Self::CopiesIgnoreEachOther,
        ]
        .into_iter()
        .find(|mutation| format!("{mutation:?}") == name)
        .expect("a mutation")
    }
}

/// Names the library for a child process.
pub const LIBRARY: &str = "KVCELLAR_STUB_LIBRARY";

/// The loaded stub, for one test at a time.
pub struct Stub {
    library: &'static Library,
    _turn: MutexGuard<'static, ()>,
}

struct Library(*mut c_void);
// SAFETY: a handle of the loader's, which is never closed; the stub has its own lock.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

/// The stub's library, built once, without the functions that `without` names. A library that
/// somebody may have loaded is never written again.
pub fn build(without: &[&str]) -> PathBuf {
    static BUILT: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/cuda/stub");
    let program = std::env::current_exe().expect("this program");
    let beside = program.parent().expect("its folder").join("stubs");
    let folder = beside.join(format!("{}-{}", without.join("-"), std::process::id()));
    std::fs::create_dir_all(&folder).expect("a directory");
    // The name that is tried first wins over a driver that this machine may have.
    let library = folder.join("libcuda.so");
    if built.contains(&library) {
        return library;
    }
    let made = folder.join("being-made");
    let done = Command::new("cc")
        .args([
            "-std=c11",
            "-D_GNU_SOURCE",
            "-O1",
            "-g",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            "-pthread",
            "-Wl,-soname,libcuda.so,-Bsymbolic",
        ])
        .args(without.iter().map(|what| format!("-DWITHOUT_{what}")))
        .args([sources.join("model.c"), sources.join("libcuda.c")])
        .arg("-o")
        .arg(&made)
        .output()
        .expect("a C compiler, as Rust itself needs one");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    std::fs::rename(&made, &library).expect("renamed");
    built.push(library.clone());
    library
}

fn library() -> &'static Library {
    static LOADED: OnceLock<Library> = OnceLock::new();
    LOADED.get_or_init(|| {
        // A child is told which one; else it is the whole one.
        let path = std::env::var_os(LIBRARY).map_or_else(|| build(&[]), PathBuf::from);
        let path = CString::new(path.as_os_str().as_encoded_bytes()).expect("a path");
        // SAFETY: our own library. Its name makes the loader give it to whoever asks for the
        // driver's from here on.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        assert!(!handle.is_null(), "the stub cannot be loaded");
        Library(handle)
    })
}

impl Library {
    fn function(&self, name: &CStr) -> *mut c_void {
        // SAFETY: an open library and a name.
        let found = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        assert!(!found.is_null(), "the stub has no {name:?}");
        found
    }
}

macro_rules! call {
    ($library:expr, $name:literal, ($($type:ty),*) $(-> $back:ty)?, $($argument:expr),*) => {
        // SAFETY: the type is that of the stub's function, and pointers outlive the call.
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) $(-> $back)?>($library.function($name))($($argument),*) }
    };
}

impl Stub {
    /// Takes the stub, as new.
    pub fn take(seed: u64) -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let stub = Self { library: library(), _turn: turn };
        // What an earlier test let go of, however that ended.
        stub.hold_pinning(false);
        stub.hold_unpinning(false);
        pinning::settle();
        call!(stub.library, c"stub_reset", (u64), seed);
        stub
    }

    fn set(&self, what: &CStr, value: u64) {
        call!(self.library, c"stub_set", (*const c_char, u64), what.as_ptr(), value);
    }

    /// Copier's calls are changed from here on.
    pub fn mutate(&self, mutation: Mutation) {
        self.set(c"mutation", mutation as u64);
    }

    /// Nothing that is given to the device runs until it is let go.
    pub fn hold(&self, held: bool) {
        self.set(c"held", held.into());
    }

    /// Whatever may run runs at once, in the order in which it was given.
    pub fn eager(&self) {
        self.set(c"eager", 1);
    }

    /// Copies of ordinary memory are wrong.
    pub fn strict(&self) {
        self.set(c"strict", 1);
    }

    /// Bytes that can be pinned.
    pub fn limit_pinned(&self, bytes: u64) {
        self.set(c"register_limit", bytes);
    }

    /// Bytes that one call can pin.
    pub fn limit_calls(&self, bytes: u64) {
        self.set(c"register_most", bytes);
    }

    /// From here on another thread captures a graph, and whoever has not said that it stays out of
    /// it must not disturb that.
    pub fn capture(&self) {
        self.set(c"capturing", 1);
    }

    /// Pinning takes until it is let go.
    pub fn hold_pinning(&self, held: bool) {
        self.set(c"register_held", held.into());
    }

    /// Unpinning takes until it is let go.
    pub fn hold_unpinning(&self, held: bool) {
        self.set(c"unregister_held", held.into());
    }

    /// A function answers `code` for `times` calls, after `skip` good ones.
    pub fn fail(&self, name: &str, skip: i32, times: i32, code: i32) {
        let name = CString::new(name).expect("a name");
        call!(self.library, c"stub_fail", (*const c_char, c_int, c_int, c_int), name.as_ptr(), skip, times, code);
    }

    /// How often a function was called.
    pub fn calls(&self, name: &str) -> i32 {
        let name = CString::new(name).expect("a name");
        call!(self.library, c"stub_calls", (*const c_char) -> c_int, name.as_ptr())
    }

    /// A stream on which vLLM computes.
    pub fn compute(&self) -> ComputeStream {
        ComputeStream(call!(self.library, c"stub_compute", () -> u64,))
    }

    /// A forward pass that writes `byte` to these ranges, or reads them.
    pub fn forward(&self, compute: ComputeStream, ranges: &[(u64, usize)], byte: u8, writes: bool) {
        let (starts, lens): (Vec<u64>, Vec<usize>) = ranges.iter().copied().unzip();
        call!(
            self.library,
            c"stub_forward",
            (u64, *const u64, *const usize, usize, c_int, c_int),
            compute.0,
            starts.as_ptr(),
            lens.as_ptr(),
            ranges.len(),
            byte.into(),
            writes.into()
        );
    }

    /// The host reads memory, or gives it to somebody else.
    pub fn touch(&self, start: u64, len: usize, write: bool) {
        call!(self.library, c"stub_touch", (u64, usize, c_int), start, len, write.into());
    }

    /// Everything given to the device is over.
    pub fn finish(&self) {
        call!(self.library, c"stub_finish", (),);
    }

    /// What the checker found: how much, and the first of it.
    pub fn wrongs(&self) -> (i32, String) {
        let mut text = vec![0_u8; 256];
        let count =
            call!(self.library, c"stub_wrongs", (*mut c_char, usize) -> c_int, text.as_mut_ptr().cast(), text.len());
        let end = text.iter().position(|byte| *byte == 0).expect("an end");
        (count, String::from_utf8_lossy(&text[..end]).into_owned())
    }

    /// The checker found nothing, also in what was let go of.
    pub fn is_clean(&self) {
        pinning::settle();
        let (count, first) = self.wrongs();
        assert_eq!(count, 0, "{first}");
    }
}

/// Memory that counts as the device's from here on. For whoever does not hold the stub.
pub fn adopt(start: u64, len: usize) {
    call!(library(), c"stub_adopt", (u64, usize), start, len);
}
