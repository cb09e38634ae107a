//! Aligned memory, and how much of it there is.

#![allow(unsafe_code)] // an aligned allocation viewed as f32 or i32

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Alignment of buffers: that of the plan's offsets.
pub(super) const ALIGN: usize = 256;

/// From this size on, buffers are aligned to the pages that they ask for.
const HUGE_PAGE: usize = 2 << 20;

/// Zeroed bytes aligned to [`ALIGN`]. Always initialised, so every 4 bytes are a valid f32 and a valid i32.
pub(super) struct Buffer {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a Buffer owns its memory as a Vec does; it has no interior mutability.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Default for Buffer {
    fn default() -> Self {
        Buffer {
            start: NonNull::dangling(),
            bytes: 0,
        }
    }
}

impl Buffer {
    /// `bytes` (rounded up to [`ALIGN`]) zeroes. The caller has checked that there is so much memory.
    pub(super) fn zeroed(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(ALIGN);
        if bytes == 0 {
            return Buffer::default();
        }
        let layout = layout(bytes);
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout);
        };
        ask_for_huge_pages(start, bytes);
        Buffer { start, bytes }
    }

    /// Size.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes it at least `bytes` large; contents are lost when it grows.
    pub(super) fn grow(&mut self, bytes: usize) {
        if bytes > self.bytes {
            *self = Buffer::default();
            *self = Buffer::zeroed(bytes);
        }
    }

    /// First byte.
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// All of it as floats.
    pub(super) fn f32(&self) -> &[f32] {
        // SAFETY: `bytes` initialised bytes, aligned to 256; every bit pattern is an f32. Empty: dangling is aligned to 1 only, so a
        // literal is used.
        if self.bytes == 0 {
            &[]
        } else {
            unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.bytes / 4) }
        }
    }

    /// All of it as floats, writable.
    pub(super) fn f32_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `f32`, and self is borrowed mutably.
        if self.bytes == 0 {
            &mut []
        } else {
            unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.bytes / 4) }
        }
    }

    /// All of it as integers.
    pub(super) fn i32(&self) -> &[i32] {
        // SAFETY: as in `f32`; every bit pattern is an i32.
        if self.bytes == 0 {
            &[]
        } else {
            unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.bytes / 4) }
        }
    }

    /// All of it as integers, writable.
    pub(super) fn i32_mut(&mut self) -> &mut [i32] {
        // SAFETY: as in `f32_mut`.
        if self.bytes == 0 {
            &mut []
        } else {
            unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.bytes / 4) }
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated by `zeroed` with this layout.
            unsafe { dealloc(self.start.as_ptr(), layout(self.bytes)) }
        }
    }
}

fn layout(bytes: usize) -> Layout {
    let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { ALIGN };
    Layout::from_size_align(bytes, align).expect("a size below isize::MAX")
}

/// Asks the kernel to back a large buffer with 2 MiB pages, where it does so only on request (Debian's and Ubuntu's default): strided
/// walks over an arena of 4 KiB pages miss the TLB at almost every row. A refusal costs nothing but that.
#[cfg(target_os = "linux")]
fn ask_for_huge_pages(start: NonNull<u8>, bytes: usize) {
    if bytes >= HUGE_PAGE {
        // SAFETY: the range was just allocated, and this advice changes no contents.
        unsafe {
            libc::madvise(
                start.as_ptr().cast(),
                bytes / HUGE_PAGE * HUGE_PAGE,
                libc::MADV_HUGEPAGE,
            );
        }
    }
}

/// Other systems choose page sizes by themselves.
#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_: NonNull<u8>, _: usize) {}

/// Bytes this process may still take: the smaller of what the kernel calls available and what its control group leaves.
/// `None` where neither can be read (not Linux).
pub fn available_bytes() -> Option<usize> {
    let meminfo = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| mem_available(&text));
    let group = cgroup_left();
    match (meminfo, group) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// `MemAvailable` of /proc/meminfo in bytes.
fn mem_available(text: &str) -> Option<usize> {
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    let kib: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Limit less use of the process's control group (version 2, then 1); page cache counts as use there, so its reclaimable part is
/// given back.
fn cgroup_left() -> Option<usize> {
    let read = |p: &str| -> Option<usize> { std::fs::read_to_string(p).ok()?.trim().parse().ok() };
    let pairs = [
        (
            "/sys/fs/cgroup/memory.max",
            "/sys/fs/cgroup/memory.current",
            "/sys/fs/cgroup/memory.stat",
            "inactive_file",
        ),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
            "/sys/fs/cgroup/memory/memory.stat",
            "total_inactive_file",
        ),
    ];
    pairs.iter().find_map(|(max, current, stat, field)| {
        let (max, current) = (read(max)?, read(current)?);
        let cache = std::fs::read_to_string(stat)
            .ok()
            .and_then(|text| {
                text.lines()
                    .find_map(|l| l.strip_prefix(field)?.trim().parse::<usize>().ok())
            })
            .unwrap_or(0);
        Some(max.saturating_sub(current.saturating_sub(cache)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_kib() {
        assert_eq!(
            mem_available("MemTotal: 9 kB\nMemAvailable:     12 kB\n"),
            Some(12 * 1024)
        );
        assert_eq!(mem_available("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn buffers_are_zeroed_aligned_and_grow() {
        let mut b = Buffer::zeroed(10);
        assert_eq!(b.bytes(), 256);
        assert_eq!(b.as_ptr() as usize % ALIGN, 0);
        assert!(b.f32().iter().all(|&x| x == 0.0));
        b.grow(1000);
        b.f32_mut()[249] = 1.0;
        assert_eq!(b.i32()[249], 1f32.to_bits() as i32);
        assert!(Buffer::default().f32().is_empty());
    }
}
