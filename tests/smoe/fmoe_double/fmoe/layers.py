fmoe_faster_schedule = False
