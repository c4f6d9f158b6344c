"""Which of a model's variables are theta, and how much weight decay each has."""

import warnings

import keras
import numpy as np

from . import checks, keras_facts


def selected(model, parameters, x):
    """Return the variables that `parameters` names, each once, as `Objective` takes it."""
    if parameters is None:
        chosen = list(model.trainable_variables)
    elif isinstance(parameters, str) and parameters == "last_layer":
        chosen = keras_facts.last_layer(model, x).trainable_variables
    elif isinstance(parameters, str):
        raise ValueError(
            f"parameters='{parameters}' is not known: use None, 'last_layer', or a "
            "list of layers, their names, or variables."
        )
    else:
        layers, chosen = keras_facts.all_layers(model), []
        for q in _listed(parameters):
            named = [la for la in layers if la.name == q] if isinstance(q, str) else [q]
            if len(named) != 1:
                count = f"{len(named)} layers are" if named else "No layer is"
                every = sorted({la.name for la in layers})
                raise ValueError(f"{count} called {q}: pass variables, or one of {every}.")
            chosen += _variables(named[0])
    unique = list({id(v): v for v in chosen}.values())  # a shared layer is listed once
    if not unique:
        raise ValueError("No trainable parameter is selected: are all layers frozen?")
    bound = [v.path for v in unique if getattr(v, "constraint", None) is not None]
    if bound:
        warnings.warn(
            f"{bound} have a constraint, which influence does not know: it takes theta as free.",
            stacklevel=3,
        )
    return unique


def _listed(chosen):
    """Return what was chosen as a list: one layer or variable may come alone."""
    return [chosen] if isinstance(chosen, (keras.layers.Layer, keras.Variable)) else chosen


def _variables(chosen):
    """Return the variables of a layer, or of a variable itself."""
    if isinstance(chosen, keras.Variable):
        return [chosen]
    if isinstance(chosen, keras.layers.Layer):
        return chosen.trainable_variables
    raise TypeError(
        f"A {type(chosen).__name__} is no layer, name of a layer, or Keras variable (of a "
        "layer: layer.trainable_variables)."
    )


def common_dtype(model, variables):
    """Return the type that the model computes in, float32 or float64."""
    mixed = [
        la.name for la in keras_facts.all_layers(model) if la.variable_dtype != la.compute_dtype
    ]
    if mixed:
        raise ValueError(
            f"Layers {mixed[:3]} compute in {model.compute_dtype} but store {model.variable_dtype}:"
            " second derivatives in mixed precision are too coarse. Load the model under "
            "keras.config.set_dtype_policy('float32') (or 'float64')."
        )
    dtypes = {v.dtype for v in variables}
    if not dtypes <= {"float32", "float64"}:
        raise ValueError(f"The parameters must be float32 or float64, not {dtypes}.")
    return max(dtypes)  # LoRA's are float32 in a float64 model


def decay(model, variables, weight_decay, decayed):
    """Return the weight decay of each parameter, (p,) float64."""
    own = {id(v): _l2(v) for v in variables}
    layers = keras_facts.all_layers(model)
    activity = [la.name for la in layers if la.activity_regularizer is not None]
    if activity:
        raise ValueError(
            f"Layers {activity} carry an activity regulariser, which is no function "
            "of one example's loss: remove it or put it into the loss."
        )
    tied = sum(v.regularizer is not None for v in model.trainable_variables)
    if len(model.losses) > tied:
        raise ValueError(
            "The model adds losses of its own (add_loss): move them into the "
            "per-example loss, so that each example carries its share."
        )
    if weight_decay is None:
        if getattr(getattr(model, "optimizer", None), "weight_decay", None):
            raise ValueError(
                "The model was compiled with decoupled weight decay (AdamW), which "
                "minimises no fixed objective: pass weight_decay= yourself."
            )
        per_variable = [own[id(v)] for v in variables]
    else:
        if any(own.values()) and weight_decay:
            raise ValueError(
                "The model already decays its weights (kernel_regularizer) and "
                "weight_decay was given too: pass weight_decay=None to use the "
                "model's own (Keras' `l2(c)` is a weight decay of 2c)."
            )
        weight_decay = checks.number("weight_decay", weight_decay)
        chosen = _decayed(layers, variables, decayed)
        per_variable = [weight_decay * (id(v) in chosen) + own[id(v)] for v in variables]
    sizes = [int(np.prod(v.shape)) for v in variables]
    return np.repeat(np.array(per_variable, np.float64), sizes)


def _decayed(layers, variables, decayed):
    """Return the ids of the variables that `weight_decay` applies to."""
    if isinstance(decayed, str) and decayed in ("kernels", "all"):
        return {id(v) for v in variables if decayed == "all" or keras_facts.is_kernel(v)}
    if isinstance(decayed, str):
        raise ValueError(f"decayed='{decayed}' is not known: 'kernels', 'all' or variables.")
    found = set()
    for each in _listed(decayed):
        if isinstance(each, str):
            those = [v for v in variables if f"/{v.path}".endswith(f"/{each}")]
            inside = {id(v) for la in layers if la.name == each for v in la.trainable_variables}
            those = those or [v for v in variables if id(v) in inside]
        else:
            own = {id(v) for v in _variables(each)}
            those = [v for v in variables if id(v) in own]
        if not those:
            raise ValueError(
                f"decayed names {getattr(each, 'path', each)}, which is none of the selected "
                f"parameters: {[v.path for v in variables]}."
            )
        found |= {id(v) for v in those}
    return found


def _l2(variable):
    regularizer = variable.regularizer
    if regularizer is None:
        return 0.0
    known = type(regularizer) in (keras.regularizers.L2, keras.regularizers.L1L2)
    if known and not float(getattr(regularizer, "l1", 0)):
        return 2.0 * float(regularizer.l2)
    raise ValueError(
        f"{variable.path} has a {type(regularizer).__name__} regulariser; only L2 has "
        "a Hessian that influence functions can use."
    )
