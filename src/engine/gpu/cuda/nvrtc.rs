//! NVRTC, the compiler that torch brings along, loaded at run time. Compiles the gather kernel for
//! the device at hand. Without it copies go without the kernel.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

/// The kernel's text.
const SOURCE: &str = include_str!("../../../../cuda/gather.cu");

/// Names under which NVRTC is found when something has loaded it already, or when the system has
/// it.
const NAMES: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so.12"];

/// Why there is no kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoKernel {
    /// No library at any of the places.
    #[error("NVRTC is not there (libnvrtc, which torch brings as nvidia-cuda-nvrtc)")]
    NotThere,
    /// A library without this function.
    #[error("the NVRTC found has no {0}")]
    NoFunction(&'static str),
    /// The compiler refused. Its code, and what it wrote.
    #[error("NVRTC refused the kernel for sm_{capability} with code {code}: {log}")]
    Refused {
        /// The device's compute capability.
        capability: i32,
        /// NVRTC's answer.
        code: c_int,
        /// What it wrote.
        log: String,
    },
}

type Program = *mut c_void;

type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Copy = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

struct Compiler {
    create: Create,
    destroy: Destroy,
    compile: Compile,
    binary_size: Size,
    binary: Copy,
    log_size: Size,
    log: Copy,
}

/// Compiles the kernel for a device of this compute capability. `places`: files to look at before
/// the system's own.
///
/// # Errors
/// [`NoKernel`].
pub fn compile(places: &[PathBuf], capability: i32) -> Result<Vec<u8>, NoKernel> {
    let compiler = Compiler::find(places)?;
    let text = CString::new(SOURCE).map_err(|_| NoKernel::NotThere)?;
    let target = CString::new(format!("--gpu-architecture=sm_{capability}")).map_err(|_| NoKernel::NotThere)?;
    let mut program: Program = ptr::null_mut();
    let refused = |code, log| NoKernel::Refused { capability, code, log };
    // SAFETY: the texts outlive the call, which copies them; no headers are given.
    let code = unsafe {
        (compiler.create)(&raw mut program, text.as_ptr(), c"gather.cu".as_ptr(), 0, ptr::null(), ptr::null())
    };
    if code != 0 {
        return Err(refused(code, String::new()));
    }
    // SAFETY: the program was made above; one option, which outlives the call.
    let code = unsafe { (compiler.compile)(program, 1, [target.as_ptr()].as_ptr()) };
    let outcome = if code == 0 {
        read(program, compiler.binary_size, compiler.binary).map_err(|code| refused(code, String::new()))
    } else {
        let log = read(program, compiler.log_size, compiler.log).unwrap_or_default();
        Err(refused(code, String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned()))
    };
    // SAFETY: made above, and not used after this.
    unsafe { (compiler.destroy)(&raw mut program) };
    outcome
}

impl Compiler {
    fn find(places: &[PathBuf]) -> Result<Self, NoKernel> {
        let names = NAMES.iter().map(Path::new);
        let library = places.iter().map(PathBuf::as_path).chain(names).find_map(open).ok_or(NoKernel::NotThere)?;
        macro_rules! function {
            ($name:literal, $type:ty) => {
                // SAFETY: the field's type is NVRTC's for this function, unchanged since CUDA 11.
                // The library is never closed.
                unsafe { std::mem::transmute::<*mut c_void, $type>(symbol(library, $name)?) }
            };
        }
        Ok(Self {
            create: function!(c"nvrtcCreateProgram", Create),
            destroy: function!(c"nvrtcDestroyProgram", Destroy),
            compile: function!(c"nvrtcCompileProgram", Compile),
            binary_size: function!(c"nvrtcGetCUBINSize", Size),
            binary: function!(c"nvrtcGetCUBIN", Copy),
            log_size: function!(c"nvrtcGetProgramLogSize", Size),
            log: function!(c"nvrtcGetProgramLog", Copy),
        })
    }
}

/// What one of the compiler's two-part questions answers: how long, then the bytes.
fn read(program: Program, size: Size, copy: Copy) -> Result<Vec<u8>, c_int> {
    let mut len = 0;
    // SAFETY: the program is alive; the pointer is to a local.
    let code = unsafe { size(program, &raw mut len) };
    if code != 0 {
        return Err(code);
    }
    let mut bytes = vec![0_u8; len];
    // SAFETY: the compiler writes as many bytes as it said.
    let code = unsafe { copy(program, bytes.as_mut_ptr().cast()) };
    if code == 0 { Ok(bytes) } else { Err(code) }
}

fn open(name: &Path) -> Option<*mut c_void> {
    // The compiler looks for a part of its own by name only, not beside itself: it has to be there
    // already.
    let folder = name.parent().and_then(|folder| std::fs::read_dir(folder).ok());
    for part in folder.into_iter().flatten().flatten() {
        if part.file_name().as_encoded_bytes().starts_with(b"libnvrtc-builtins.so") {
            load(&part.path(), libc::RTLD_GLOBAL);
        }
    }
    load(name, libc::RTLD_LOCAL)
}

fn load(name: &Path, scope: c_int) -> Option<*mut c_void> {
    let name = CString::new(name.as_os_str().as_encoded_bytes()).ok()?;
    // SAFETY: the name ends in a null byte; the library's initialisation does nothing that others
    // see. It is never closed.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | scope) };
    (!library.is_null()).then_some(library)
}

fn symbol(library: *mut c_void, name: &'static CStr) -> Result<*mut c_void, NoKernel> {
    // SAFETY: the handle is an open library's, the name ends in a null byte.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    if found.is_null() { Err(NoKernel::NoFunction(name.to_str().unwrap_or_default())) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_none_is_no_kernel() {
        // A library without the compiler's functions, and files that are no libraries.
        let other = PathBuf::from("libc.so.6");
        assert_eq!(compile(&[other], 90), Err(NoKernel::NoFunction("nvrtcCreateProgram")));
        let nothing = [PathBuf::from("/nonexistent/libnvrtc.so.13"), PathBuf::from("/proc/self/status")];
        match compile(&nothing, 90) {
            // Unless the system has one.
            Ok(image) => assert!(image.starts_with(b"\x7fELF")),
            Err(error) => assert_eq!(error, NoKernel::NotThere),
        }
    }
}
