//! The marimba command as a library.
