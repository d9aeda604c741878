"""Loss functions in diffusion models: derived, implemented and measured against an exact floor.

Every public name comes from the top, `from lfdm import DiffusionLoss`, and from its module,
`from lfdm.losses import DiffusionLoss`. A module is imported when one of its names is first used, so
that `import lfdm` is light. This file is written by hand, and tests/test_names.py compares it with the modules.
"""
__version__ = "0.1.0"

from importlib import import_module as _import_module

# The public names of each module, as in its __all__.
_NAMES = {
    'adaptive': 'ENOUGH LossHistory require_one_each AdaptiveSchedule',
    'best_answers': 'best_answer best_denoiser error_floor',
    'brackets': 'LARGEST FITTED Values Errors Bracket overlap bracket',
    'cache': 'npz_bytes require_array cached_arrays key_of cache_root remembered',
    'checkpoints':
        'UNUSABLE training_options require_network write_checkpoint content_digest Checkpoint '
        'read_checkpoint require_state require_match restore',
    'contrastive': 'ContrastiveLoss contrastive_floor',
    'core':
        'LONGEST short shown listed unknown lookup Choice from_spec spec own_word instance number '
        'checked_seed checked_device seeded Numeric typed expand is_symbolic maths as_number formula '
        'from_extra in_one_line announce sync write_whole project_root',
    'data':
        'SPLITS MAX_CELLS DATASETS NoDensity stream require_drawn checked_dtype Dataset checked_finite '
        'checked_mixture require_standardized require_points checked_scale checked_scales checked_level '
        'checked_logsnr rowwise GaussianMixture midpoints Cluster Ring Swiss Waves',
    'densities': 'LaplaceSchedule CauchySchedule CosMapSchedule ModeSchedule BetaSchedule',
    'discrete': 'BETAS Staircase DiscreteSchedule DDPMSchedule',
    'embedded': 'random_frame Embedded as_dataset',
    'empirical': 'BLOCK CELLS CACHED checked_stored Stored Empirical',
    'errors': 'SCALES_OF_C ERRORS Error ScaledError Squared L1 Huber PseudoHuber LogCosh',
    'evaluation':
        'DISTANCES require_method floor_per_logsnr floor require_comparable require_finite mean_distance '
        'covariance_distance unit_vectors sliced_wasserstein sorted_lines distance_of_lines noise_floor '
        'judge require_samples',
    'explorer':
        'SLIDERS WORDS IDLE CHAINS FLOOR_FROM FLOOR_TO FLOOR_STEP EXACT symbolic as_javascript '
        'schedule_formulas rules explorer_formulas explorer_data explorer_page write_explorer',
    'folders': 'SCALES checked_scale checked_name runs_root place suffixed',
    'grids':
        'SHARED KEEPS_MEMORY EVALUATIONS grid stacks_of checked_all train_stacked sample_stacked '
        'side_by_side make_grid Runs make_images',
    'images.data':
        'EDGE ENDINGS FOREIGN FORMATS CHANNELS LOSSY MOST_PIXELS MANY TOO_MANY MOST_BYTES IMAGES '
        'require_bytes require_images dequantize scaled quantize dequantization_bits ImageSet stratified '
        'Digits image_grid CIFAR10 class_files decode ImageFolder',
    'images.features':
        'FEATURES_VERSION MANY_IMAGES SMALL LARGE FeatureNet classifier_features feature_net '
        'feature_distance classifier_view',
    'images.fid':
        'INCEPTION_FILE INCEPTION_DIGEST INCEPTION_DIMS MOST_WEIGHTS moments frechet_distance inception_file '
        'inception checked_pictures fid stated',
    'images.parameters':
        'CONTENT FOLDERS require_network require_enough_images has_folder image_set content_of '
        'ImageParameters',
    'images.task':
        'LOSS_DRAWS BOUND_DRAWS require_content require_own_device require_finite require_image_bytes '
        'mirrored judge_images ImageTask image_table',
    'images.templates': 'log_cell cell_integrals Templates',
    'images.unet':
        'ATTENTION UNETS time_embedding TimeEmbedding ResBlock AttentionBlock DownBlock MidBlock UpBlock '
        'require_size UNet unet',
    'interop':
        'PREDICTIONS BETA_SCHEDULES SCHEDULERS BetasSchedule from_diffusers to_diffusers as_network as_unet',
    'ledger':
        'NBS REFERENCE PAGES DOCUMENTS TITLES NUMBER STATUSES VERDICTS JOINT RANGE CAN_FAIL LINE FIGURES '
        'SETTLED OPTIONAL STYLE GREEK TABLES named heading_id pages read place checks mentions entries '
        'ledger place_faults faults errata errata_faults equation_table status_table errata_table '
        'errata_list search_entries refreshed settle write_pages',
    'likelihood':
        'DECODERS flow_log_prob checked_data checked_trace prior_kl Bound nelbo bits_per_dim '
        'discrete_reconstruction ImageBound image_bound flow_bits_per_dim',
    'lookup': 'own_w Row code_bases which_loss',
    'losses': 'predict draw require_batch require_shape require_prediction DiffusionLoss',
    'networks': 'MLP StackedMLP',
    'parameters':
        'RESULTS_VERSION RANGE_FIELDS ALSO_JUDGED_BY whole_number name_in choice_in schedule_named '
        'checked_schedule checked_kind require_enough require_fields checked_precision RunParameters '
        'Parameters valid_names parameters_from',
    'plots':
        'COLORS LABELS DASHES STABLE ANONYMOUS DPI use_style freeze_layout shrunk render describe '
        'save_figure figure_record show keep scatter band forward_row plot_forward score_field exact_report '
        'plot_loss plot_loss_per_logsnr plot_samples plot_sampling plot_field show_images plot_noisy_images '
        'plot_image_samples',
    'proofs': 'prove check refute',
    'runs':
        'FILES CHECKPOINT UNITS Run folder_of require_digests require_record require_same load_run '
        'write_record reseal beside require_no_link work_folder locked advice_on_writing advice_on_memory '
        'make_run require_accelerator progress_bar summary_table',
    'sampling': 'sampling checked_schedule checked_shape sample stack_denoiser sample_stack',
    'schedules':
        'SCHEDULES CONTINUOUS Level transition posterior preserving exploding straight require_finite '
        'require_formula advice_on_timesteps checked_time Schedule cosine_path cosine_time CosineSchedule '
        'LinearSchedule LinearLogSNRSchedule VESchedule ShiftedCosineSchedule BellSchedule EDMTrainSchedule '
        'EDMSampleSchedule FlowSchedule checked_shift RectifiedFlowSchedule LogitNormalSchedule dlog_alpha '
        'sde sample_times network_time network_logsnr',
    'score_matching':
        'DIRECTIONS OBJECTIVES require_differentiable divergence projected_divergence probe_vectors '
        'checked_kind checked_score Objective Explicit Denoising Implicit Hutchinson Sliced require_fixed '
        'checked_levels ScoreMatchingLoss ScaledScore',
    'steps':
        'SAMPLERS Denoiser Step network_denoiser exact_denoiser Counted checked_within require_denoise '
        'require_level checked_guess require_noise ancestral_step ddim_step velocity at_angle checked_angle '
        'euler_step heun_step solve adaptive_step edm_step dpmpp_2m_step euler_maruyama_step langevin_step '
        'annealed_langevin_step predictor_corrector_step',
    'studies':
        'NETWORKS SCREENING WAYS CURVES PER_LOGSNR FIRST_SEED SAMPLED OUTCOMES RATES ADVICE error_variance '
        'arrow_grid learned_score outside sample_quality network_quality quality_of measure measured '
        'all_cached Record load_record flat condense make_record outcomes next_rates mean_sd table '
        'paired_ratio holm verdict advice',
    'targets': 'TARGETS widened checked_like Target X Eps V Score F Flow convert',
    'tasks': 'RUN_KINDS Task require_points PointsTask kind_of task_of',
    'training':
        'PRECISIONS ema_decay clip_gradients warmed_up cooled_down with_precision TrainState train '
        'checked_epochs checked_batch_size require_data require_known_learners alike train_stack',
    'uncertainty': 'Uncertainty',
    'validation': 'ValidationSet',
    'variances':
        'VARIANCES variance_terms snr_gain ReverseVariance PosteriorVariance StepVariance '
        'InterpolatedVariance OptimalVariance exact_spread estimated_spread chain_floor',
    'weighted_elbo':
        'level_grid exact_slope eps_slope ELBOs elbos exact_elbos model_elbos weight over_slopes over_elbos '
        'augmentation over_augmentation draw_levels elbo_shares kl_and_fisher',
    'weightings':
        'WEIGHTINGS CHOICES Weighting LogSNRWeighting EpsFactor NELBO Weighted Rescaled Simple SNR '
        'SNRPlusOne TruncatedSNR MinSNR SoftMinSNR Debiased JiT CosMapWeight P2 DDPMVLB Sech Exponential '
        'Sigmoid EDM EDMMonotonic as_triple Implied Monotonic implied_w rising_intervals',
}
_MODULES = (*_NAMES, 'images')
_HOMES = {}   # name -> the modules that have it
for _module, _names in _NAMES.items():
    for _name in _names.split(): _HOMES.setdefault(_name, []).append(_module)
del _module, _names, _name


def __getattr__(name):
    "A module, or a public name of one. A name that is a module and a function is the module."
    if name in _MODULES: return _import_module(f'lfdm.{name}')
    homes = _HOMES.get(name, ())
    if not homes:
        own = _import_module(__name__)   # from its names, Python tells the nearest
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}', name=name, obj=own)
    if len(homes) > 1:
        among = ' and '.join(f'lfdm.{module}' for module in homes)
        raise ImportError(f'{name} is a name of {among}: import it from the one you mean.', name=name)
    value = globals()[name] = getattr(_import_module(f'lfdm.{homes[0]}'), name)
    return value


def __dir__():
    "The modules, and the names that stand for one thing."
    names = (name for name, homes in _HOMES.items() if len(homes) == 1)
    return sorted({*globals(), *(module for module in _MODULES if '.' not in module), *names})
