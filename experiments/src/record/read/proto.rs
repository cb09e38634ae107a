//! The messages of TensorFlow's `event.proto`, `summary.proto`, `tensor.proto` and of TensorBoard's `hparams/plugin_data.proto`, as far
//! as they are read here.

use std::collections::BTreeMap;

/// A message: its fields as `name: type = (kind, tag)`.
macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $ty:ty = ($($kind:tt)*);)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, prost::Message)]
        pub(super) struct $name {
            $(#[prost($($kind)*)] pub(super) $field: $ty,)*
        }
    )*};
}

messages! {
    Event {
        wall_time: f64 = (double, tag = "1");
        step: i64 = (int64, tag = "2");
        file_version: Option<String> = (string, optional, tag = "3");
        summary: Option<Summary> = (message, optional, tag = "5");
        session_log: Option<SessionLog> = (message, optional, tag = "7");
    }

    /// Status 1 is START.
    SessionLog {
        status: i32 = (int32, tag = "1");
    }

    Summary {
        value: Vec<Value> = (message, repeated, tag = "1");
    }

    Value {
        tag: String = (string, tag = "1");
        simple_value: Option<f32> = (float, optional, tag = "2");
        histo: Option<Histo> = (message, optional, tag = "5");
        tensor: Option<Tensor> = (message, optional, tag = "8");
        metadata: Option<Metadata> = (message, optional, tag = "9");
    }

    Metadata {
        plugin_data: Option<PluginData> = (message, optional, tag = "1");
    }

    PluginData {
        plugin_name: String = (string, tag = "1");
        content: Vec<u8> = (bytes = "vec", tag = "2");
    }

    Histo {
        min: f64 = (double, tag = "1");
        max: f64 = (double, tag = "2");
        num: f64 = (double, tag = "3");
        sum: f64 = (double, tag = "4");
        sum_squares: f64 = (double, tag = "5");
        bucket_limit: Vec<f64> = (double, repeated, tag = "6");
        bucket: Vec<f64> = (double, repeated, tag = "7");
    }

    Tensor {
        dtype: i32 = (int32, tag = "1");
        tensor_shape: Option<Shape> = (message, optional, tag = "2");
        tensor_content: Vec<u8> = (bytes = "vec", tag = "4");
        float_val: Vec<f32> = (float, repeated, tag = "5");
        double_val: Vec<f64> = (double, repeated, tag = "6");
        int_val: Vec<i32> = (int32, repeated, tag = "7");
        string_val: Vec<Vec<u8>> = (bytes = "vec", repeated, tag = "8");
        int64_val: Vec<i64> = (int64, repeated, tag = "10");
        half_val: Vec<i32> = (int32, repeated, tag = "13");
    }

    Shape {
        dim: Vec<Dim> = (message, repeated, tag = "2");
    }

    Dim {
        size: i64 = (int64, tag = "1");
    }

    HParams {
        session_start_info: Option<SessionStart> = (message, optional, tag = "3");
    }

    SessionStart {
        hparams: BTreeMap<String, HParam> = (btree_map = "string, message", tag = "1");
    }

    /// A `google.protobuf.Value`: one of these.
    HParam {
        number_value: Option<f64> = (double, optional, tag = "2");
        string_value: Option<String> = (string, optional, tag = "3");
        bool_value: Option<bool> = (bool, optional, tag = "4");
    }
}
