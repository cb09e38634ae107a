//! Typed graph of coarse ops, passes, autodiff and memory plan.
