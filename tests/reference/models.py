"""The model of each method."""

from reference import adapters, affine, hst, prompts, sides, temporal, toast
from reference.vit import ViT

MODELS = {
  'adapter': adapters.Adapter,
  'adapter_plus': adapters.AdapterPlus,
  'adaptformer': adapters.AdaptFormer,
  'convpass': adapters.Convpass,
  'convpass_attn': adapters.ConvpassAttn,
  'dora': affine.DoRA,
  'dtl': sides.DTL,
  'express': prompts.Express,
  'fact_tk': affine.FacTTK,
  'fact_tt': affine.FacTTT,
  'full': ViT,
  'hst': hst.HST,
  'last': sides.LAST,
  'lora': affine.LoRA,
  'losa': sides.LoSA,
  'lst': sides.LST,
  'noah': prompts.NOAH,
  'prefix': prompts.Prefix,
  'prompt_accumulate': prompts.PromptAccumulate,
  'repadapter': affine.RepAdapter,
  'res_tuning': prompts.ResTuning,
  'res_tuning_bypass': sides.ResTuningBypass,
  'ssf': affine.SSF,
  'st_adapter': adapters.STAdapter,
  'temporal': temporal.Temporal,
  'toast': toast.TOAST,
  'toast_lite': toast.TOASTLite,
  'vera': affine.VeRA,
  'vpt_deep': prompts.VPTDeep,
  'vpt_shallow': prompts.VPTShallow,
}
