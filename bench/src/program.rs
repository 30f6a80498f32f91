//! A program of fifty megabytes, to see whether a thousand slivers that run it hold one copy of it.
//!
//! It is made here, byte by byte, because no compiler is needed for what it does: it reads one byte of each of its pages, says `touched`,
//! and waits for ever. Each page has its number in it, so no two are alike and none is a hole.

/// Size of a page, bytes.
const PAGE: usize = 4096;
/// Where it is mapped: where the linker would put it.
const BASE: u64 = 0x40_0000;
/// ELF header and one program header.
const HEADERS: u64 = 64 + 56;
/// What it says when all its pages were read.
pub const TOUCHED: &str = "touched\n";

/// The program: an ELF executable of `pages` pages, at least one.
pub fn image(pages: u32) -> Vec<u8> {
    let size = pages.max(1) as usize * PAGE;
    let mut image = Vec::with_capacity(size);
    image.extend(headers(size as u64));
    image.extend(code(size as u64));
    image.extend(TOUCHED.as_bytes());
    while image.len() < size {
        let page = (image.len() / PAGE) as u64;
        image.extend(page.to_le_bytes());
    }
    image.truncate(size);
    image
}

/// ELF header and the one segment: the whole file, readable and executable.
fn headers(size: u64) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    header.extend(2u16.to_le_bytes()); // executable
    header.extend(62u16.to_le_bytes()); // x86-64
    header.extend(1u32.to_le_bytes());
    header.extend((BASE + HEADERS).to_le_bytes()); // entry
    header.extend(64u64.to_le_bytes()); // program headers
    header.extend(0u64.to_le_bytes()); // no section headers
    header.extend(0u32.to_le_bytes());
    for field in [64u16, 56, 1, 0, 0, 0] {
        header.extend(field.to_le_bytes());
    }
    header.extend(1u32.to_le_bytes()); // load
    header.extend(5u32.to_le_bytes()); // read, execute
    for field in [0, BASE, BASE, size, size, PAGE as u64] {
        header.extend(field.to_le_bytes());
    }
    header
}

/// What it does, in machine code. The text of [`TOUCHED`] follows it.
fn code(size: u64) -> Vec<u8> {
    let mut code = Vec::new();
    code.extend([0xbe]); // mov esi, BASE
    code.extend((BASE as u32).to_le_bytes());
    code.extend([0xbf]); // mov edi, end
    code.extend(((BASE + size) as u32).to_le_bytes());
    code.extend([0x8a, 0x06]); // next: mov al, [rsi]
    code.extend([0x81, 0xc6]); // add esi, PAGE
    code.extend((PAGE as u32).to_le_bytes());
    code.extend([0x39, 0xfe]); // cmp esi, edi
    code.extend([0x72, 0xf4]); // jb next
    code.extend([0xb8, 1, 0, 0, 0]); // mov eax, write
    code.extend([0xbf, 1, 0, 0, 0]); // mov edi, standard output
    code.extend([0xbe]); // mov esi, text
    let text = BASE + HEADERS + CODE;
    code.extend((text as u32).to_le_bytes());
    code.extend([0xba, TOUCHED.len() as u8, 0, 0, 0]); // mov edx, length
    code.extend([0x0f, 0x05]); // syscall
    code.extend([0xb8, 34, 0, 0, 0]); // wait: mov eax, pause
    code.extend([0x0f, 0x05]); // syscall
    code.extend([0xeb, 0xf7]); // jmp wait
    code
}

/// Length of the code.
const CODE: u64 = 53;

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn code_is_as_long_as_the_text_expects() {
        assert_eq!(code(PAGE as u64).len() as u64, CODE);
        assert_eq!(headers(1).len() as u64, HEADERS);
    }

    #[test]
    fn it_reads_itself_says_so_and_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        std::fs::write(&path, image(300)).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = Command::new(&path).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = [0; TOUCHED.len()];
        child.stdout.take().unwrap().read_exact(&mut said).unwrap();
        assert_eq!(said, TOUCHED.as_bytes());
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", child.id())).unwrap();
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(smaps.contains("Rss:                1200 kB"), "{smaps}");
    }

    #[test]
    fn no_two_pages_are_alike() {
        let image = image(9);
        let mut pages: Vec<&[u8]> = image.chunks(PAGE).collect();
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(pages.len(), 9);
    }
}
