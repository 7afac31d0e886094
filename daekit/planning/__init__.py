from daekit.planning.plan import plan_recipe
from daekit.planning.training import Machine
