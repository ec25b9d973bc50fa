"""A second implementation of the methods in NumPy, float64, written from the published equations.

It shares no code with the package and nothing but the names of the parameters; speed is no aim.
Every operation is analytic in its complex arguments, so that one pass with parameters
p + i h v yields the features (real part) and their derivative along v (imaginary part / h), exact
to rounding: the complex step of Squire and Trapp 1998, 'Using complex variables to estimate
derivatives of real functions'. What a method detaches is cut by taking the real part.
"""
